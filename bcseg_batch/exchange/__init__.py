"""What goes to other programs and comes back from them: QuPath, ImageJ, COCO, label images.

A module for each form: arrays and rows in, bytes out, and the reverse where a form comes back.
`folder.py` alone reads and writes files.
"""
