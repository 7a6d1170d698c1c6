"""Fit all six quantizers to every weight of PixArt-alpha and store them in multiquantizers/pixart_alpha_mq.pt.

python scripts/pixart_alpha_multiquantizer.py
python scripts/pixart_alpha_multiquantizer.py --model_id embedded
"""

from stages import multiquantizer
from stages.common import run_stage

if __name__ == "__main__":
    run_stage(multiquantizer.main, "pixart_alpha")
