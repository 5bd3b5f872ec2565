"""What only a GPU can show; without one there is nothing to collect."""

import torch

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py", "test_cuda_inference.py"]
