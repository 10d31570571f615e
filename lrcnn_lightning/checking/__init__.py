"""Checking a module: plain and row-wise steps of copies of it, compared value by value.

check       the public function        baseline    the plain run, and how it was made possible
report      what it says               subject     copies of the module
comparison  one value, and its verdict example     the arguments
steps       steps and what they show   state       what a module holds, by name
                                       chance      the random generators
"""

from lrcnn_lightning.checking.check import check
from lrcnn_lightning.checking.comparison import Comparison
from lrcnn_lightning.checking.report import CheckReport

__all__ = ["CheckReport", "Comparison", "check"]
