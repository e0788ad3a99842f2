"""`lipcert certify-images`: from image collections to a Parquet data set of answers, resumable."""
