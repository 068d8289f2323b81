"""What pyproject.toml cannot say: a wheel carries pretrained/ as harmonylib/pretrained. All else stands there."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = ("*.safetensors", "*.json", "*.md", "LICENSE")
LEFT_OUT = ("training.json", "scores.json", "gpu")  # how they were made and what they reached: the model cards say it


class BuildWithWeights(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # the clone's own are found
            return
        for path in (path for kind in CARRIED for path in Path("pretrained").rglob(kind)):
            if path.name not in LEFT_OUT and path.parent.name not in LEFT_OUT:
                target = Path(self.build_lib, "harmonylib", path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithWeights})
