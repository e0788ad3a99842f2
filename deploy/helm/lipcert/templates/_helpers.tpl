{{- define "lipcert.name" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride }}
{{- else if contains "lipcert" .Release.Name -}}
{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-lipcert" (.Release.Name | trunc 44 | trimSuffix "-") }}
{{- end -}}
{{- end -}}

{{- define "lipcert.selector" -}}
app.kubernetes.io/name: lipcert
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "lipcert.metadata" -}}
name: {{ include "lipcert.name" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "lipcert.labels" . | nindent 2 }}
{{- end -}}

{{- define "lipcert.labels" -}}
{{ include "lipcert.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "lipcert.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (ternary "gpu" "cpu" .Values.gpu.enabled) }}
{{- end -}}
{{- end -}}

{{- define "lipcert.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- define "lipcert.fetches" -}}
{{- with .Values.models }}{{ if or .copyFrom.image .objectStore.source }}yes{{ end }}{{ end -}}
{{- end -}}

{{- define "lipcert.artefacts" -}}
{{- if or (include "lipcert.fetches" .) .Values.models.volume }}yes{{ end -}}
{{- end -}}

{{- /* What the schema cannot say. */ -}}
{{- define "lipcert.check" -}}
{{- with .Values.models }}
{{- if gt (len (compact (list (ternary "volume" "" (not (empty .volume))) .copyFrom.image .objectStore.source))) 1 }}
{{- fail "models: set one of volume, copyFrom.image and objectStore.source" }}
{{- end }}
{{- if and (include "lipcert.fetches" $) (not .signers) (not .allowUnsigned) }}
{{- fail "models.signers: whoever can write to the source decides what is served. Name the public keys that sign its models, or set models.allowUnsigned" }}
{{- end }}
{{- end }}
{{- if and .Values.autoscaling.enabled (not .Values.autoscaling.cpuUtilization) (not .Values.autoscaling.waiting) }}
{{- fail "autoscaling: set cpuUtilization, waiting, or both" }}
{{- end }}
{{- if and .Values.keys.secret .Values.monitoring.serviceMonitor (not .Values.monitoring.keySecret.name) }}
{{- fail "monitoring.keySecret.name: with API keys, Prometheus needs one of the scope metrics" }}
{{- end }}
{{- if and (eq (toString .Values.strategy.maxUnavailable) "0") (eq (toString .Values.strategy.maxSurge) "0") }}
{{- fail "strategy: maxUnavailable and maxSurge cannot both be 0" }}
{{- end }}
{{- end -}}
