"""Which of the two uses of calibration each algorithm is given: levels by moments, and compensated rounding.

By measurement on the embedded PixArt-alpha: all weights under one method, 48 images (those of 3 bits but K-Means-C, 32) at
guidance 4, mean squared difference of pixels to full precision from the same noise; moments of 48 to 64 images, in full
precision and under the nearest levels:

                 nearest    rounding    levels    both
    UAQ 4        0.0066     0.0044      0.0092    0.0050
    K-Means-A 3  0.0308     0.0405      0.0232    0.0288

UAQ 3 falls from 0.0234 to 0.0152 by rounding, K-Means-C 3 from 0.0128 to 0.0103, K-Means-C 4 from 0.0022 to 0.0018 and
K-Means-A 4 not at all (0.0089, 0.0090), with moments of 16 images. K-Means-C has both as an earlier trial found it best.

Why compensation hurts K-Means-A at 3 bits: on the way of the full-precision images it lowers the denoiser's own error, at
every step and in all its parts (squared, of the guided output: 0.25 to 0.18; its mean over images and over steps too).
But a denoiser of so few levels leaves that way, where rounding that knows nothing else has larger errors than the nearest
levels: they feed on themselves, and the latents' variance, 0.98 in full precision and 2.3 under the nearest levels, grows
to 4.6. So moments are averaged over both networks' own ways and damped by a tenth of their mean, which brings it to 3.5.
Text padding is left out and every step is heard, so neither explains it.
"""

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
