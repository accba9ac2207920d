"""An HTTP server with the interface of OpenAI's completions, around an engine (:mod:`fqjax.inference.engine`)."""
