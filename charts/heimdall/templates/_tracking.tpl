{{- /* The parts that MLflow's server, what waits before it and what migrates have in common. */}}
{{- define "heimdall.trackingPod" -}}
automountServiceAccountToken: false
securityContext:
  {{- include "heimdall.podSecurity" . | nindent 2 }}
  runAsUser: 65532
  runAsGroup: 65532
{{- end }}

{{- define "heimdall.trackingDatabase" -}}
- {name: BACKEND_STORE_URI, value: {{ . | quote }}}
{{- end }}

{{- define "heimdall.trackingServerEnv" -}}
# libpq takes the password from here: it is in no argument and no address.
- {name: PGPASSWORD, valueFrom: {secretKeyRef: {name: {{ include "heimdall.databaseSecret" . }}, key: mlflow-password}}}
{{- if .Values.database.external }}
- {name: PGSSLMODE, value: {{ include "heimdall.sslMode" . | quote }}}
{{- end }}
{{- if include "heimdall.caSource" . }}
- {name: PGSSLROOTCERT, value: /etc/heimdall-ca/ca.crt}
- {name: AWS_CA_BUNDLE, value: /etc/heimdall-ca/ca.crt}
{{- end }}
{{- if include "heimdall.hasAuth" . }}
- {name: MLFLOW_AUTH_CONFIG_PATH, value: /beside/basic_auth.ini}
{{- end }}
{{ include "heimdall.noTelemetry" . }}
- {name: MLFLOW_SERVER_ENABLE_JOB_EXECUTION, value: "false"}
- {name: HOME, value: /tmp}
{{- with .Values.tracking.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "heimdall.noTelemetry" -}}
- {name: MLFLOW_DISABLE_TELEMETRY, value: "true"}
- {name: DO_NOT_TRACK, value: "true"}
{{- end }}

{{- define "heimdall.trackingMounts" -}}
- {name: beside, mountPath: /beside, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- include "heimdall.caMount" . }}
{{- end }}

{{- define "heimdall.trackingVolumes" -}}
- {name: beside, configMap: {name: {{ include "heimdall.fullname" . }}-tracking}}
- {name: tmp, emptyDir: {}}
{{- include "heimdall.caVolume" . }}
{{- end }}

{{- define "heimdall.trackingSmallContainer" -}}
resources: {{- toYaml .Values.jobs.resources | nindent 2 }}
securityContext: {{- include "heimdall.containerSecurity" . | nindent 2 }}
volumeMounts: {{- include "heimdall.trackingMounts" . | nindent 2 }}
{{- end }}
