"""Hosts as network namespaces, a real Ray cluster over them, faults, and what clients see."""
