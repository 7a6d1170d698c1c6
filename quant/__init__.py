"""Quantization of any PyTorch module's weights; of diffusers' models as artefacts that diffusers saves and loads.

    QuantizedModel      fit, apply, restore, pack (quant/model.py)
    Qua2SeDiMoConfig    for `from_pretrained(..., quantization_config=...)` (quant/pretrained.py)
    save_packed, load_packed    for modules that are not diffusers' (quant/packed_folder.py)

Importing this package is enough for `from_pretrained` to load models that were saved quantized.
"""

from quant.model import QuantizedModel
from quant.packed_folder import load_packed, save_packed
from quant.pretrained import Qua2SeDiMoConfig, register

__all__ = ["Qua2SeDiMoConfig", "QuantizedModel", "load_packed", "save_packed"]

register()
