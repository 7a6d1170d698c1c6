"""Where your datasets are. Edit these paths before labelling configurations of the real models, or set
environment variables of the same names, which win.
"""

import os

COCO_2017_PROMPTS = os.environ.get("COCO_2017_PROMPTS", "/your/path/to/coco/2017/val/captions/captions_val2017.json")
COCO_2017_IMAGES = os.environ.get("COCO_2017_IMAGES", "/your/path/to/coco/2017/val/images/")

IMAGENET_VAL_IMAGES = os.environ.get("IMAGENET_VAL_IMAGES", "/your/path/to/ImageNet/val")
