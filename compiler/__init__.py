"""Capture, intermediate representation, axes, planning, pipeline, artifact, verification and command line."""
