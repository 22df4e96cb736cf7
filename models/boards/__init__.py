"""Handwriting boards: the embedded data set. Grids of real handwritten digits with questions that need
several reads and some arithmetic.

scans (what is written) -> layout (which scan stands where) -> questions (families) -> chains (strategies)
-> oracle.
"""
