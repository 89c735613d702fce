"""The two task interfaces, bases for tasks on two views and with a linear head, and the bundled tasks, one a file."""

from .base import Bound, DownstreamTask, PretextTask, Task
from .linear import LinearTask
from .two_views import TwoViewTask

__all__ = ["Bound", "DownstreamTask", "LinearTask", "PretextTask", "Task", "TwoViewTask"]
