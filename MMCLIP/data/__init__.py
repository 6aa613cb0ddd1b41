"""Rows, readers, made-up radiographs, augmentation and the collator: from a data set on disk to a batch."""
