#!/bin/sh
# Makes the buckets, and for each a user who may use that one alone. Changes nothing where they are there.
#     MC_HOST_store=http://USER:PASSWORD@HOST:9000 MLFLOW_S3_PASSWORD=… DVC_S3_PASSWORD=… sh buckets.sh
set -eu

bucket() {
    mc mb --ignore-existing "store/$1"
    mc admin user add store "$1" "$2"
    cat > "/tmp/$1.json" <<JSON
{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"],
   "Resource": ["arn:aws:s3:::$1"]},
  {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject",
   "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"], "Resource": ["arn:aws:s3:::$1/*"]}
]}
JSON
    mc admin policy create store "$1" "/tmp/$1.json"
    mc admin policy attach store "$1" --user "$1" || mc admin user info store "$1" | grep -q "$1"
}

bucket mlflow "$MLFLOW_S3_PASSWORD"
bucket dvc "$DVC_S3_PASSWORD"
