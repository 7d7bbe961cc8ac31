"""A page about one run, or several side by side: python -m dist_resnet.report --help.

The page is one file without scripts: its curves are SVG drawn here, its images data: URIs. Every
figure on it is one of the run folder's, whole in the `value` of its <data> element.
"""
