"""An OpenAI-compatible HTTP server, `nabla-fast serve`.

`nabla_fast.server.engine` owns the models and decodes in one thread, a running batch for each set of settings
(`nabla_fast.server.decoding`); `nabla_fast.server.protocol` reads requests, `nabla_fast.server.replies` writes answers,
`nabla_fast.server.app` has the routes, and `nabla_fast.server.metrics` what `/metrics` says.
"""
