"""Fit all six quantizers to every weight of PixArt-Sigma and store them in multiquantizers/pixart_sigma_mq.pt.

python scripts/pixart_sigma_multiquantizer.py
python scripts/pixart_sigma_multiquantizer.py --model_id embedded
"""

from stages import multiquantizer
from stages.common import run_stage

if __name__ == "__main__":
    run_stage(multiquantizer.main, "pixart_sigma")
