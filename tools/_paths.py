"""Makes the helpers of the tests inside ComfyUI importable for the scripts here: `import _paths` comes first."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "comfyui"))
