"""Which of the two uses of calibration each algorithm is given: levels by moments, and compensated rounding."""

import torch

from quant.compensation import compensated_codes

# {algorithm: (levels, rounding)}
PAYS = {"mse": (False, True), "kmeans": (True, True), "kmeans_all": (True, False)}
OTHERS = (False, True)


@torch.no_grad()
def calibrated(weight, quantizer, parameters, moments, levels=None, rounding=None):
    """The parameters {name: tensor} of a quantizer, calibrated by the `moments` of the weight's [C, ...] inputs.

    `levels` fits its tables by the moments, else they are those of `parameters`; `rounding` adds codes that compensate
    errors. None is what pays for the algorithm.
    """
    default = PAYS.get(quantizer.algorithm, OTHERS)
    levels, rounding = (own if asked is None else asked for asked, own in zip((levels, rounding), default, strict=True))
    if levels:
        parameters = quantizer.fit(weight, moments)
    if not rounding:
        return parameters
    tables = {name: parameters[name] for name in quantizer.tables}
    return tables | {"codes": compensated_codes(weight, quantizer, tables, moments)}
