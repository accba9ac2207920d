"""Array code of the methods: the plans of a layer.  The settings it takes are the configurations in :mod:`fqjax.methods`."""
