"""Fit all six quantizers to every weight of DiT-XL/2 and store them in multiquantizers/dit_mq.pt.

python scripts/dit_multiquantizer.py
python scripts/dit_multiquantizer.py --model_id embedded
"""

from stages import multiquantizer
from stages.common import run_stage

if __name__ == "__main__":
    run_stage(multiquantizer.main, "dit")
