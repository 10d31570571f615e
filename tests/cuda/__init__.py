"""The same tests on the CPU, where they are small, and on a GPU (``python -m pytest -m cuda``).

They need PyTorch, Lightning, pytest and hypothesis; torchvision's networks are taken on a GPU if it is there.
"""
