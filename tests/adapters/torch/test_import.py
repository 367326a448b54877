"""What an import needs. These run where there is no PyTorch too."""

import subprocess
import sys


def test_without_pytorch_it_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; import kedge.adapters; import kedge.adapters.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("ImportError: kedge.adapters.torch needs PyTorch: pip install kedge[torch]")


def test_adapters_are_imported_without_pytorch():
    code = "import sys, kedge.adapters; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
