"""Trained models as folders that transformers loads, and such folders back as weights.

*_switchall.py are the files that an export carries: they import torch and transformers alone, nothing of this project,
and stay in the folder with the weights.
"""
