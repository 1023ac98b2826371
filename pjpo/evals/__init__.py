"""What runs are measured by: `build(context, data)` gives a function (params, ref_params) -> metrics and samples."""
