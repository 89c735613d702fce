"""Features of finished backbones and their pictures (appendix C.1)."""
