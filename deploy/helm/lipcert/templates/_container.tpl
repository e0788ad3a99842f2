{{- define "lipcert.env" -}}
- {name: LIPCERT_DRAIN_S, value: {{ .Values.shutdown.drainSeconds | quote }}}
- {name: LIPCERT_GRACE_S, value: {{ .Values.shutdown.graceSeconds | quote }}}
- {name: LIPCERT_PROVIDER, value: {{ ternary "cuda" "cpu" .Values.gpu.enabled }}}
{{- if include "lipcert.artefacts" . }}
- {name: LIPCERT_MODELS, value: {{ list "/models" .Values.models.path | join "/" | clean | quote }}}
{{- end }}
{{- with .Values.models.default }}
- {name: LIPCERT_DEFAULT_MODEL, value: {{ . | quote }}}
{{- end }}
{{- if .Values.models.signers }}
- {name: LIPCERT_REQUIRE_SIGNATURE, value: /etc/lipcert/signers/keys}
{{- end }}
{{- if .Values.keys.secret }}
- {name: LIPCERT_API_KEYS_FILE, value: /etc/lipcert/keys/keys}
{{- end }}
{{- if .Values.tls.secret }}
- {name: LIPCERT_TLS_CERTIFICATE, value: /etc/lipcert/tls/tls.crt}
- {name: LIPCERT_TLS_KEY, value: /etc/lipcert/tls/tls.key}
{{- end }}
{{- /* JSON, because a template writes a large number with an exponent. */ -}}
{{- range $name, $value := .Values.settings }}
- {name: {{ $name }}, value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* The server checks signatures itself, at the start and at every reload; the init container only fetches. */ -}}
{{- define "lipcert.fetch" -}}
- name: fetch
  {{- include "lipcert.container" . | nindent 2 }}
  {{- if .Values.models.copyFrom.image }}
  image: {{ .Values.models.copyFrom.image }}
  command: [cp, -r, {{ printf "%s/." (trimSuffix "/" .Values.models.copyFrom.path) | quote }}, /fetched/]
  {{- else }}
  image: {{ .Values.models.objectStore.image }}
  args: [copy, {{ .Values.models.objectStore.source | quote }}, /fetched]
  env:
    - {name: HOME, value: /tmp}
    {{- if .Values.models.objectStore.secret }}
    - {name: RCLONE_CONFIG, value: /etc/rclone/rclone.conf}
    {{- end }}
  {{- end }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {cpu: "1", memory: 512Mi}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: models, mountPath: /fetched}
    {{- if .Values.models.objectStore.secret }}
    - {name: object-store, mountPath: /etc/rclone, readOnly: true}
    {{- end }}
{{- end -}}
