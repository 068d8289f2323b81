"""Composites drawn by the inverse model, and the data sets made of them."""
