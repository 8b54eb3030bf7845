"""Check cluster files: of `ray up` on AWS and GCP, and KubeRay manifests."""
