"""The site: `make docs` builds it into build/docs, without a network; its pages load nothing from anywhere else."""

import importlib.util
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "site_extensions"), str(DOCS.parent)]

import fused_clip_adam  # noqa: E402

project = "fused_clip_adam"
copyright = "the authors of fused_clip_adam, Apache-2.0"
version = release = fused_clip_adam.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "docstring_sections",
    "mathml",
    "repository_files",
]
nitpicky = True
nitpick_ignore_regex = [("py:class", r"(torch|trl|transformers|verl|stable_baselines3|torchrl|rsl_rl|lightning)\..*")]
exclude_patterns = ["figures"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
myst_url_schemes = {"http": None, "https": None, "mailto": None, "repository": None}

# Pages whose text is a file of the repository; in docs/ they are a line that says so.
repository_pages = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
# Where links to files that have a page of their own lead.
repository_links = {"README.md": "index.md", **{path: f"{page}.md" for page, path in repository_pages.items()}}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes, dtypes and units are in the text
python_maximum_signature_line_length = 100
default_role = "name"  # of docstring_sections: `PPO` leads to PPO
# Trainers that are not installed where the site is built: their classes are bases here, no more.
TRAINERS = ("stable_baselines3", "torchrl", "tensordict", "rsl_rl", "lightning", "verl", "trl", "transformers")
autodoc_mock_imports = [name for name in TRAINERS if importlib.util.find_spec(name) is None]

html_theme = "furo"
html_title = f"fused_clip_adam {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["site.css"]
pygments_style = "friendly"
