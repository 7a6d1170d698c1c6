"""Fit all six quantizers to every weight of Stable Diffusion XL and store them in multiquantizers/sdxl_mq.pt.

python scripts/sdxl_multiquantizer.py
python scripts/sdxl_multiquantizer.py --model_id embedded
"""

from stages import multiquantizer
from stages.common import run_stage

if __name__ == "__main__":
    run_stage(multiquantizer.main, "sdxl")
