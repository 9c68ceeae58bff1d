"""Our own torch operators: quantization and raised patterns, each with a reference implementation.

Importing this package registers them under the ``compile_sparse`` namespace.
"""

from compile_sparse.compiler.ir.ops import fused as patterns
from compile_sparse.compiler.ir.ops import quantization

__all__ = ["patterns", "quantization"]
