{{- define "heimdall.fullname" -}}
{{- if contains "heimdall" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-heimdall{{ end }}
{{- end }}

{{- /* Labels of a role: include "heimdall.labels" (dict "root" $ "role" "operator") */}}
{{- define "heimdall.labels" -}}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{ include "heimdall.selector" . }}
{{- end }}

{{- define "heimdall.selector" -}}
app.kubernetes.io/name: heimdall
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- define "heimdall.databaseSecret" -}}
{{- .Values.database.existingSecret | default (printf "%s-database" (include "heimdall.fullname" .)) }}
{{- end }}

{{- define "heimdall.objectStoreSecret" -}}
{{- .Values.objectStore.existingSecret | default (printf "%s-object-store" (include "heimdall.fullname" .)) }}
{{- end }}

{{- define "heimdall.databaseHost" -}}
{{- if .Values.database.external }}{{ required "database.externalHost is needed with database.external" .Values.database.externalHost }}
{{- else }}{{ include "heimdall.fullname" . }}-database.{{ .Release.Namespace }}.svc{{ end }}
{{- end }}

{{- define "heimdall.objectStoreUrl" -}}
{{- if .Values.objectStore.external }}{{ required "objectStore.externalUrl is needed with objectStore.external" .Values.objectStore.externalUrl }}
{{- else }}http://{{ include "heimdall.fullname" . }}-object-store.{{ .Release.Namespace }}.svc:9000{{ end }}
{{- end }}

{{- define "heimdall.trackingUrl" -}}
{{- if .Values.tracking.external }}{{ required "tracking.externalUrl is needed with tracking.external" .Values.tracking.externalUrl }}
{{- else }}http://{{ include "heimdall.fullname" . }}-tracking.{{ .Release.Namespace }}.svc:5000{{ end }}
{{- end }}

{{- /* The data of a Secret whose values are generated once: what the cluster has wins. Computed once a rendering, because
other Secrets are made of the same values. include "heimdall.secretData" (dict "root" $ "name" NAME "generated" DICT) gives JSON
of base64 values. */}}
{{- define "heimdall.secretData" -}}
{{- $memo := get .root.Values "memo" | default dict }}
{{- if not (hasKey $memo .name) }}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .name }}
{{- $kept := dict }}
{{- if $found }}{{- $kept = $found.data | default dict }}{{- end }}
{{- $data := dict }}
{{- range $key, $value := .generated }}
{{- $_ := set $data $key (get $kept $key | default ($value | b64enc)) }}
{{- end }}
{{- $_ := set $memo .name (merge (dict) $kept $data) }}
{{- $_ := set .root.Values "memo" $memo }}
{{- end }}
{{- get $memo .name | toJson }}
{{- end }}

{{- define "heimdall.databaseData" -}}
{{- $generated := dict }}
{{- range list "postgres-password" "mlflow-password" "writer-password" "reader-password" }}
{{- $_ := set $generated . (randAlphaNum 32) }}
{{- end }}
{{- include "heimdall.secretData" (dict "root" . "name" (include "heimdall.databaseSecret" .) "generated" $generated) }}
{{- end }}

{{- define "heimdall.objectStoreData" -}}
{{- $generated := dict "root-user" "heimdall-root" "root-password" (randAlphaNum 32) }}
{{- range list "mlflow" "writer" "reader" }}
{{- $_ := set $generated (printf "%s-access-key" .) (printf "heimdall-%s" .) }}
{{- $_ := set $generated (printf "%s-secret-key" .) (randAlphaNum 32) }}
{{- end }}
{{- include "heimdall.secretData" (dict "root" . "name" (include "heimdall.objectStoreSecret" .) "generated" $generated) }}
{{- end }}

{{- /* What reads or writes recordings: include "heimdall.recordingsAccess" (dict "root" $ "who" "reader") */}}
{{- define "heimdall.recordingsAccess" -}}
{{- $root := .root }}
{{- $database := include "heimdall.databaseData" $root | fromJson }}
{{- $store := include "heimdall.objectStoreData" $root | fromJson }}
HEIMDALL_DATABASE_URL: {{ printf "postgresql://heimdall_%s@%s:%v/heimdall" .who (include "heimdall.databaseHost" $root) $root.Values.database.port | b64enc }}
PGPASSWORD: {{ get $database (printf "%s-password" .who) }}
HEIMDALL_RECORDINGS_URL: {{ printf "s3://%s" $root.Values.objectStore.recordingsBucket | b64enc }}
HEIMDALL_S3_ENDPOINT_URL: {{ include "heimdall.objectStoreUrl" $root | b64enc }}
HEIMDALL_S3_ACCESS_KEY: {{ get $store (printf "%s-access-key" .who) }}
HEIMDALL_S3_SECRET_KEY: {{ get $store (printf "%s-secret-key" .who) }}
{{- end }}

{{- define "heimdall.podSecurity" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "heimdall.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
{{- end }}
