"""Published data sets, one reader a file.

torchvision's readers are imported by the function that calls them: they take nearly as long to import as torch.
"""
