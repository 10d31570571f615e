"""Hydra configurations of lrcnn-lightning, at ``pkg://lrcnn_lightning.conf``.

In the repository they lie in ``conf``; the package has them as ``lrcnn_lightning/conf`` (a link in the repository, a
copy in a wheel).  Hydra imports this package when it is on the search path, and importing it registers the schema of
group ``strategy``, so that group is checked in other people's applications, too.
"""

from __future__ import annotations

from lrcnn_lightning.cli.schema import register_schemas

register_schemas()
