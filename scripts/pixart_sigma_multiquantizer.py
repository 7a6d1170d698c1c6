"""Fit all six quantizers to every weight of PixArt-Sigma and store them in multiquantizers/pixart_sigma_mq.pt.

python scripts/pixart_sigma_multiquantizer.py
python scripts/pixart_sigma_multiquantizer.py --model_id embedded
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("multiquantizer", "pixart_sigma")
