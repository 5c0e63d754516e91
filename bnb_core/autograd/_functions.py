"""bitsandbytes' flat names of products: `import bnb_core.autograd._functions`."""

from bnb_core.quantization.functions import MatMul4Bit, MatMul8bitFp, MatMul8bitLt
from bnb_core.quantization.products import MatmulLtState, matmul, matmul_4bit

__all__ = ["MatMul4Bit", "MatMul8bitFp", "MatMul8bitLt", "MatmulLtState", "matmul", "matmul_4bit"]
