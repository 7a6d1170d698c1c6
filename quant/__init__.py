"""Quantization of any PyTorch module's weights; of diffusers' models as artefacts that diffusers saves and loads.

    QuantizedModel      fit, apply, restore, pack (quant/model.py)
    Qua2SeDiMoConfig    for `from_pretrained(..., quantization_config=...)` (quant/pretrained.py)

Importing this package is enough for `from_pretrained` to load models that were saved quantized.
"""

from quant.model import QuantizedModel
from quant.pretrained import Qua2SeDiMoConfig, register

__all__ = ["Qua2SeDiMoConfig", "QuantizedModel"]

register()
