"""What pyproject.toml cannot say: a wheel carries the embedded model and the data of the embedded tasks."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ASSETS = Path(__file__).resolve().parents[1] / "assets"
CARRIED = ("tiny-llava-onevision", "shapes_video", "easy_vqa")


class BuildWithAssets(build_py):
    """Copies assets/ into the package and names them in the task files from there. Not run by `-e`."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, "lmms_eval_accelerate")
        shutil.rmtree(package / "assets", ignore_errors=True)  # a build folder may be an older one
        for name in CARRIED:
            if not (ASSETS / name).is_dir():
                raise FileNotFoundError(f"{ASSETS / name}: build the wheel in a checkout, `pip wheel ./lmms-eval`")
            shutil.copytree(ASSETS / name, package / "assets" / name)
        for task in (package / "tasks").rglob("*.yaml"):
            text = task.read_text(encoding="utf-8")
            task.write_text(text.replace("../../../../assets/", "../../assets/"), encoding="utf-8")


setup(cmdclass={"build_py": BuildWithAssets})
