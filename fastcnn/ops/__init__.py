"""The registered operators ``torch.ops.fastcnn.*``, one file each."""
