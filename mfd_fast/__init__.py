"""Mean Flow Distillation of flow-matching models, with fast rollouts of teacher and auxiliary."""

from mfd_fast.distillation import distill as distill
from mfd_fast.finished import load_student as load_student
from mfd_fast.integration import PairStats as PairStats
from mfd_fast.mean_velocity import integrate as integrate
from mfd_fast.mean_velocity import mean_velocity as mean_velocity
from mfd_fast.mean_velocity import mean_velocity_pair as mean_velocity_pair
from mfd_fast.recommend import Recommendation as Recommendation
from mfd_fast.recommend import recommend as recommend
from mfd_fast.settings_io import load_settings as load_settings
from mfd_fast.student import Student as Student
from mfd_fast.task import Task as Task
from mfd_fast.types import RolloutStats as RolloutStats
from mfd_fast.types import SharedBackbone as SharedBackbone
from mfd_fast.types import Status as Status
from mfd_fast.types import VelocityField as VelocityField
from mfd_fast.warmup import WarmupReport as WarmupReport
from mfd_fast.warmup import warmup as warmup

__version__ = "0.1.0"
