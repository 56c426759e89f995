"""What is on disk: images, outputs and records."""

import logging

# What it remarks about an odd file either changes nothing or becomes our note or error.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
