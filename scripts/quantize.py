"""Quantize the denoisers of any diffusers pipeline; what is written loads by `import quant` and `from_pretrained`.

python scripts/quantize.py --model_id black-forest-labs/FLUX.1-schnell --output flux_packed --device cuda --offload model
python scripts/quantize.py --model_id models/embedded/sdxl --output sdxl_packed --avg_bits 4.5 --steps 20 --res 64
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("quantize")
