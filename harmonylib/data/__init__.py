"""Data sets: how they lie on disk, who reads and audits them, how composites and batches are made."""
