"""``python -m lmms_eval_accelerate.report RESULTS... --output DIR``: accuracy and cost as one page.

``results`` reads what runs left behind; ``accuracy`` and ``efficiency`` put together what may be compared, as objects
of ``sections``; ``statistics`` has the arithmetic, ``labels`` the names of settings, ``columns`` what the tables show,
``tables`` the same as CSV and Markdown; ``figures``, ``overlays`` and ``page`` make the HTML.
"""
