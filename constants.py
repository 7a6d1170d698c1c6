"""Where your datasets are. Edit these paths before labelling configurations of the real models."""

COCO_2017_PROMPTS = "/your/path/to/coco/2017/val/captions/captions_val2017.json"
COCO_2017_IMAGES = "/your/path/to/coco/2017/val/images/"

IMAGENET_VAL_IMAGES = "/your/path/to/ImageNet/val"
