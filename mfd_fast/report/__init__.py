"""Pictures of a run and one self-contained HTML page about it. Needs ``pip install "mfd_fast[report]"`` when called."""

from mfd_fast.report.grid import image_grid as image_grid
from mfd_fast.report.grid import save_image_grid as save_image_grid
from mfd_fast.report.html import write_report as write_report
