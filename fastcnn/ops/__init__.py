"""The registered operators ``torch.ops.fastcnn.*``: ``<op>.py`` registers one, ``<backend>/<op>.py`` implements it."""
