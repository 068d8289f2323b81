"""What everything else stands on: files, settings, seeds, devices, images, caches, progress."""
