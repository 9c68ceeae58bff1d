"""Published one-shot compression methods on a Hugging Face Llama, written from their papers.

They work on transformers modules in place and import nothing of compile_sparse, so that what they measure does not depend on
what it is compared with.
"""
