"""`hf-fae train FOLDER`: from a folder of images to a generator, in stages that are the training scripts."""
