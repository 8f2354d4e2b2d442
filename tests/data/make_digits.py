"""Make `arm_core/data/assets/digits.npz` from scikit-learn's handwritten digits."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).parents[2] / "arm_core" / "data" / "assets" / "digits.npz"

if __name__ == "__main__":
    digits = load_digits()
    np.savez_compressed(TARGET, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")
